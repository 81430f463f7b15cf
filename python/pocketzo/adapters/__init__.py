"""Tuned sets leave: folded into the weights, or written as adapters of other libraries; and PEFT's come in."""
