"""Other libraries' interfaces over our networks and kernels: one module for each, named after the package it replaces.

Nothing is imported here: `import fastddpm` needs none of those packages, and each module says itself what it needs.
"""
