"""Files that were made to do harm, by kind and attack: each is refused, and does nothing."""
