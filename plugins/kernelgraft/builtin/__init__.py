"""The plugins of this distribution: one thin file each, found through entry points like anybody else's."""
