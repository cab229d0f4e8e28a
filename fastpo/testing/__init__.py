"""What fastpo's own tests are built from, for users who write a loss or a backend of their own.

    budget      how far a result may be from the float64 truth, derived from data
    traffic     exact count of the bytes that Triton kernels ask of memory, under its interpreter
    rows        a backend's row primitives held to the float64 specification
    linear      a random LM head and its losses in float64, eager and fused
    objectives  every preset, with the options that only some have

Import the modules; their public names change only with a line in CHANGELOG.md. They need torch and,
for `traffic`, Triton; no test framework.
"""
