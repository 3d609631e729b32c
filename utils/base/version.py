"""The version of this toolkit. CHANGELOG.md lists the changes of each version."""

VERSION = '0.1.0'
