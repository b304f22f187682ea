"""What lies on disk of a run: folders, pieces of tensors, averages; read without any engine."""

import warnings

# One process may read what many wrote; torch warns that it does.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")
