"""The folder on disk: targets flow in from any number of writers, verified arrays flow out to any number of readers."""
