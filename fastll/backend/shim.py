"""Temporary: the calls of the contract by the methods that backends had before it."""

# mypy: ignore-errors


class Old:
    def map(self, call):
        if call.operation in ("sigmoid", "log_sigmoid"):
            return self._sigmoid(call.inputs[0], call.value, call.operation == "log_sigmoid")
        x, t, *p = call.inputs
        return self._binary_cross_entropy(
            x, t, call.weight, p[0] if p else None, call.scale, call.value, call.partial, call.slope
        )

    def fold(self, call):
        if call.operation == "logsumexp":
            return self._logsumexp(call.x, call.second, call.state, call.lse, call.sign)
        if call.operation == "cross_entropy":
            return self._cross_entropy(
                call.x,
                call.second,
                call.labels,
                call.weight,
                call.options,
                call.value,
                call.lse,
                call.out,
            )
        return self._softmax(call.x, call.state, call.out, call.operation == "log_softmax")
