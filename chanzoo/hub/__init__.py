"""The Hugging Face Hub: pulling, verifying, publishing, cards, and files for other runtimes."""
