"""``qlora-pl inspect``: what a run would see, looked at without running it."""
