"""The version of this toolkit; CHANGELOG.md says what each brought."""

VERSION = '0.1.0'
