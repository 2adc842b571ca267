"""The conformance kit: what every backend of ESAM must do, as checks that it runs on itself.

    python -m esam_core.conformance my_package:adapter

`adapter` describes what a backend implements for it.
"""
