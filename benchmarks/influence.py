def ratios(quick): return {}
