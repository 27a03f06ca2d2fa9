// Predictions over masks as numbers and as words, as `hf-dropkey demo` has them.

/** Probabilities of classes from logits. */
export function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = Array.from(logits, (value) => Math.exp(value - largest));
  const sum = powers.reduce((one, other) => one + other, 0);
  return powers.map((power) => power / sum);
}

/** Shannon entropy in nats. */
export function entropy(probabilities) {
  return probabilities.reduce((sum, value) => (value > 0 ? sum - value * Math.log(value) : sum), 0);
}

/**
 * Mean and standard deviation of predictions, and the mutual information of prediction and mask.
 *
 * @param {number[][]} byMask Class probabilities under each mask, at least one.
 * @returns {{probabilities: number[], std: number[], mutualInformation: number, best: number}} The information in nats;
 *   zeros with one mask.
 */
export function certainty(byMask) {
  const count = byMask.length;
  const classes = byMask[0].map((_, number) => number);
  const probabilities = classes.map((number) => byMask.reduce((sum, row) => sum + row[number], 0) / count);
  const std = classes.map((number) => {
    const squares = byMask.reduce((sum, row) => sum + (row[number] - probabilities[number]) ** 2, 0);
    return count > 1 ? Math.sqrt(squares / (count - 1)) : 0;
  });
  const each = byMask.reduce((sum, row) => sum + entropy(row), 0) / count;
  const mutualInformation = count > 1 ? Math.max(0, entropy(probabilities) - each) : 0;
  return { probabilities, std, mutualInformation, best: order(probabilities)[0] };
}

/** Numbers of the classes, the likeliest first. */
export function order(probabilities) {
  return probabilities.map((_, number) => number).sort((one, other) => probabilities[other] - probabilities[one] || one - other);
}

/** "daisy, 93 % ± 14 over 20 masks; more uncertain than 90 % of the test images". */
export function sentence(found, masks, settings) {
  const name = settings.classes[found.best];
  const spread = `${name}, ${percent(found.probabilities[found.best])} ± ${(100 * found.std[found.best]).toFixed(0)} over ${masks} masks`;
  const measured = settings.uncertainty;
  return measured && masks === settings.masks ? `${spread}; ${rankClause(found.mutualInformation, measured)}` : spread;
}

function rankClause(value, measured) {
  const values = measured.mutual_information_nats;
  const rank = values.filter((one) => one < value).length / values.length;
  const [word, fraction] = rank >= 0.5 ? ["more", rank] : ["less", 1 - rank];
  return `${word} uncertain than ${(100 * fraction).toFixed(0)} % of the ${measured.split} images`;
}

/** A probability; certainty is not claimed where rounding would. */
export function percent(value) {
  return value > 0.995 ? "over 99 %" : `${(100 * value).toFixed(0)} %`;
}

/** "17 of 20 masks say 8, 3 say 3." */
export function votes(byMask, classes) {
  const counts = new Map();
  for (const row of byMask) {
    const winner = order(row)[0];
    counts.set(winner, (counts.get(winner) ?? 0) + 1);
  }
  const [[winner, most], ...others] = [...counts].sort((one, other) => other[1] - one[1] || one[0] - other[0]);
  if (others.length === 0) return `All ${most} masks say ${classes[winner]}.`;
  const rest = others.map(([number, count]) => `${count} say ${classes[number]}`).join(", ");
  return `${most} of ${byMask.length} masks say ${classes[winner]}, ${rest}.`;
}
