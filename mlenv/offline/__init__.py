"""What offline figures say about traffic: estimates for another policy, and how well metrics have foretold experiments."""
