"""The demo: SGD, SAM and ESAM on real images, side by side."""
