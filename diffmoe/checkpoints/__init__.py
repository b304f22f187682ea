"""What a run keeps on disk: folders, pieces of tensors, averages; readable without an engine."""

import warnings

# One process may read what many wrote; torch would warn about it.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")
