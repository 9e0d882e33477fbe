"""Fine-tuned models against each other on held-out prompts."""
