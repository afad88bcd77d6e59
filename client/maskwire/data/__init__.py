"""Training data: find and read files, tokenize them, and compute batches as a function of the step."""

from maskwire.data.file_data import ByteData, FileTokens, open_data
from maskwire.data.packed_data import PackedData
from maskwire.data.pair_data import PairData
from maskwire.data.token_data import TokenData

__all__ = ["ByteData", "FileTokens", "PackedData", "PairData", "TokenData", "open_data"]
