"""The UNet: its configuration, its parts, and what it is told."""
