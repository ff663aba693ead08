"""The same work by other libraries, side by side in one run: `pytest benchmarks/peers --benchmark-only`.

The network is that of Ho et al. for CIFAR-10 (35,746,307 parameters); on a GPU also the one for 256x256 images. Every
contestant trains, with what its library gives for it, on the same random uint8 images, and samples.
"""
