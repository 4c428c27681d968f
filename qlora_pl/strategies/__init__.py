"""How a run is spread over devices: one sum of gradients (ddp), or a base cut in parts (fsdp2)."""
