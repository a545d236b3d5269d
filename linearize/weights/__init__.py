"""What training adds to a base's weights, and how it comes off again."""
