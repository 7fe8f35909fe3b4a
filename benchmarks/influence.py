def ratios(quick):
    return {}
