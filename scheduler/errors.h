// What the scheduler throws. Nothing in this folder exits or prints.
#pragma once

#include <stdexcept>

namespace mla {

// An argument outside its documented range is a std::invalid_argument.
// A queue that breaks a rule (see validator.h) is a ScheduleError.
class ScheduleError : public std::invalid_argument {
  public:
    using std::invalid_argument::invalid_argument;
};

}  // namespace mla
