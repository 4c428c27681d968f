"""A name -> a 4-bit model with adapters, its loss and its optimizer."""

import logging

# bitsandbytes warns, on import, about an inference kernel of the Hub that it could not fetch; it is
# not used here, and a warning that means nothing teaches people to skip warnings.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# And at every int8 product, that inputs pass through float16: what LLM.int8 is.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
