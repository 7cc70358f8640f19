"""What connects this package with other tools; every module here is imported when it is used."""
