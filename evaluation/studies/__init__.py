"""Studies that decide something: the exact target, equal tokens, task metrics, the forecast reward."""
