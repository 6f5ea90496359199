"""What the specification says, and nothing else.

Everything here works on bytes, text and frozen values. It needs the standard library, blake3 and rfc8785,
and never torch: whoever reads a manifest or hashes a base should not have to load a tensor library.
Comments such as ``[S3]`` name the clause of ``spec/loreg-1.md`` that the line keeps.
"""
