"""What the commands share: how they start, their exit codes, devices and run folders.

Each name comes from its module: the package imports none of them, so that --help is quick.
"""
