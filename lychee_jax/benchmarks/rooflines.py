"""What no implementation can beat: bytes over bandwidth."""

# Bytes a second that an H200 was seen to read at most: torch's cuDNN attention over a large cache, keys and values.
READ_BANDWIDTH = 4.6e12
