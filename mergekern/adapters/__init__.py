"""Low-rank adapters (LoRA): read, merged in their factors, and written."""
