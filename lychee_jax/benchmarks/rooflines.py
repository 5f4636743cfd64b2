"""What no implementation can beat: bytes over bandwidth, operations over their rate."""

# Bytes a second that an H200 was seen to read at most: torch's cuDNN attention over a large cache, keys and values.
READ_BANDWIDTH = 4.6e12
# Operations a second of an H200's tensor cores in bfloat16, as NVIDIA states them.
MATRIX_RATE = 989e12
# A sum or a gathering of a few rows over two to four H200s of one host, within a jitted loop, by XLA and NCCL.
COLLECTIVE_SECONDS = 25e-6
