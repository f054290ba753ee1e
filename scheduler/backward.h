// Backward scheduling: every sequence is planned from its finish towards its start.
#pragma once

#include "scheduler/cost_model.h"
#include "scheduler/cut.h"
#include "scheduler/problem.h"

namespace mla {

// Gives each sequence its share of the workers, then grows its reduction tree from the
// root: another reduction is added where an input is wanted last, as long as quality()
// says that the earliest partial may then start later. The partials take the free inputs,
// and as many tiles as make them start together.
Cut cut_backward(const Problem& problem, const CostModel& cost);

}  // namespace mla
