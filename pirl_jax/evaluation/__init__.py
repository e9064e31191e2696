"""What a network has learnt: its features, and one file for each protocol that judges them."""
