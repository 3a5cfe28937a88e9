"""A run of many scenes: check, fingerprint, folder, finish, compare."""
