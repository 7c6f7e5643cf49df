"""Studies: several recipes under the same conditions, run or worked out beforehand, side by side."""
