"""The cases behind spec/vectors/, written without loreg: a second implementation, and a plain one.

``make_vectors.py`` writes them out. Nothing here imports loreg, so that a vector is what the specification
says, and not what the code happens to do.
"""
