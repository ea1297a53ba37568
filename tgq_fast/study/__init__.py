"""Studies: every connector and ablation under one budget, evaluated clean and corrupted, with honest intervals."""
