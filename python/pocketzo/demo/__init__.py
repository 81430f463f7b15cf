"""The built-in example: a small pretrained encoder learns to sort phone messages."""
