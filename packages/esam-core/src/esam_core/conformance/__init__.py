"""The conformance kit: checks that every backend of ESAM must pass.

    python -m esam_core.conformance my_package:adapter

The module `adapter` describes what a backend must implement.
"""
