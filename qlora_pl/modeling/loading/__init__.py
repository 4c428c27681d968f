"""A base on disk -> a frozen model in memory: on one device, on several, or cut over them."""
