"""A finished stage's model in the forms that other programs take: GGUF, Ollama, a folder for a hub."""
