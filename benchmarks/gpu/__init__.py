"""What only a GPU can show, each check in a file of its kind; started by ``gpu_checks.py``."""
