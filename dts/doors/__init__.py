"""Doors: how programs of others reach the search. lm-evaluation-harness (`harness`), OpenAI clients (`serve`) and TRL
scripts (`trl`). Above everything else; nothing imports from here."""
