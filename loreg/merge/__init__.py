"""The streaming executor: plan from headers, execute tile by tile, verify from what was written.

Sees manifests, files and tensors; knows nothing of names, tags or stores.
"""
