"""What this machine can train, found by trying it: `qlora-pl doctor`."""
