"""Measure what dropping each branch changes: by a calibration, or from what ordinary steps compute anyway."""
