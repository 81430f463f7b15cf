"""The side head: fitted in closed form to hidden states that a frozen backbone computes once."""
