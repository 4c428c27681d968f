"""What training leaves behind for everything after it: folders, and the cards in them."""
