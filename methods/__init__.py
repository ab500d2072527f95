"""The published methods, one folder each; imported as `mergekit_ft.methods`."""

if __name__ != "mergekit_ft.methods":
    raise ImportError(f"import this folder as mergekit_ft.methods, not as {__name__}")
