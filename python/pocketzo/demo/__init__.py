"""The built-in example: fine-tuning a small pretrained encoder to classify phone messages."""
