"""Token data: documents, files and their formats, preparation, and batches as a function of the step."""

from maskwire.data.token_data import ByteData, FileTokens, TokenData, open_data

__all__ = ["ByteData", "FileTokens", "TokenData", "open_data"]
