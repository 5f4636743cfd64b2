"""What no implementation can beat: bytes over bandwidth, operations over their rate."""

# Bytes a second that an H200 was seen to read at most: torch's cuDNN attention over a large cache, keys and values.
READ_BANDWIDTH = 4.6e12
# Operations a second of an H200's tensor cores in bfloat16, as NVIDIA states them.
MATRIX_RATE = 989e12
