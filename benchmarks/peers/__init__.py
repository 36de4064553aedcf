"""The peers: their environments, their workers, and the driver that runs workers side by side."""
